"""What is learned: films of the synthetic talker or of a folder of clips, and their codecs."""
