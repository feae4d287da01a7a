"""For people: pieces of pictures, charts, and templates filled in."""
