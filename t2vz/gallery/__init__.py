"""The gallery: an output folder as a page to look at, written once or served while a run goes on."""
