"""Components for titanlm from outside of it: one of every kind, each in a file of its own."""
