"""One model on many ranks, behind one Engine. The only importer of DeepSpeed."""
