"""Generation: the cache that layers keep their state in, and sampling."""
