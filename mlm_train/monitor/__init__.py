"""What a user sees of a run: log lines, TensorBoard, throughput, memory."""
