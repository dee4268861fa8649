"""A page for driving a world model next to the ground truth and inspecting it while it runs.

`Dream` steps one world and can go back exactly; `Truth` walks the engine beside it; `Drive` is what one user drives:
dreams side by side, the truth, and what the page shows of them; `Session` is the user's connection, and `Server` holds
all sessions.
"""
