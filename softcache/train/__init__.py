"""Stage 2: students are trained from a cache. Nothing here can load a teacher."""
