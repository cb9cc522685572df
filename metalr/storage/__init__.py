"""Files that survive a crash: durable writes, the lock of a folder, sealed folders with hashes, checkpoints."""
