"""Stage two: losses, gate, checkpoint and the loop, which is handed its stream and its reward."""
