"""What the web page `app.py` is made of, besides its layout.

`model_room.py` is the one model and the line of those who wait for it, `visitors.py` keeps what belongs to a visitor
and for how long, `jobs.py` does what visitors want within the limits, `routes.py` takes and gives out video files, and
`views.py` writes HTML. Only `app.py` knows Gradio.
"""
