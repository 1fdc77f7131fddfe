"""The playground, `t2vz app`: a page with a tab for each mode, to try what a manifest's row would give."""
