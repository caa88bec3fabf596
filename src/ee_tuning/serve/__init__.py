"""An OpenAI-compatible server around one engine, which has a process of its own.

`bodies` says which fields a request may have, `reading` makes texts of it, which `worker` sends to
the engine, where `core` feeds it, in the `process` beside; `messages` says what they tell each
other. `choices` makes text of what the engine settles, `replies` what clients get of it, `app` has
the routes. `processors` change logits, `scoring` goes over whole texts, `metrics` counts.
"""
