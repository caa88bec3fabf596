"""An OpenAI-compatible server around one engine.

`bodies` says which fields a request may have, `reading` makes sequences of it, which `worker`
feeds to the engine in a thread of its own. `choices` makes text of what the engine settles,
`replies` what clients get of it, `app` has the routes. `processors` change logits, `scoring` goes
over whole texts, `speed` decides what speculation is good for, `metrics` counts.
"""
