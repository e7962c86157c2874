"""The arithmetic of stage two. The loop is handed its stream and its rewards and opens neither."""
