"""What is learned: films of the talker or of a folder of clips, and their codecs."""
