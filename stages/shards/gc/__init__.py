"""`rats shards gc`: what no experiment reaches."""
