"""The protocol between one silo and the coordinator: frames and their rules, without I/O."""
