"""What a command line may say, and which combinations cannot work."""
