"""One HTML page that tells what is known of runs: `gather` collects, `charts` draws, `page` writes, `assets` styles."""
