"""What lets a program answer `--help` and a mistyped option before it imports torch or transformers."""
