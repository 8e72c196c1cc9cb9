"""Scripts with flags: one training loop, one experiment a file. Never imported by m2, ssm or zoo."""
