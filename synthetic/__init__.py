"""Videos drawn by a program, and questions about them that have one right answer.

`scenes.py` says what happens in a video and what can be asked; `drawing.py` draws it.
"""
