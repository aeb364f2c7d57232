"""Memory: what is used, and (in later releases) what will be."""
