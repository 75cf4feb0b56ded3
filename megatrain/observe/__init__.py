"""What a run shows and leaves to read: console, metrics, TensorBoard, logs, report. On rank 0 but for the logs."""
