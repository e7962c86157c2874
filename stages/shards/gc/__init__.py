"""`rats shards gc`: finds and deletes what no experiment uses."""
