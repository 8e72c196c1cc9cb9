"""What is timed and measured; it may use every room and command, and none of them may use it."""
