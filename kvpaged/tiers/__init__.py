"""The levels under a cache's pages: host memory, disk, and whatever else keeps records by key."""
