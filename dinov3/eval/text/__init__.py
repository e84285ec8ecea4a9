"""Images and words: training dino.txt, and measuring it."""
