"""A page on which a person drives a world model, beside the truth, and looks inside while it runs.

`Dream` steps one world and can go back exactly; `Truth` walks the engine beside it; `Drive` is what one person drives:
dreams side by side, the truth, and what the page shows of them; `Session` is its connection, and `Server` has them all.
"""
