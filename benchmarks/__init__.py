"""Speed of sparse layers against dense ones, on this machine, in pairs."""
