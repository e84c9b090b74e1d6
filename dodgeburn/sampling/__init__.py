"""Text to pictures: encode prompts, choose noise levels, denoise, decode.

Reading order: `settings` (what can be asked), `prompts` (text to embeddings), `schedules` (noise levels),
`solvers` (one step each), `guidance` (how the U-Net is called), `loop` (all of it together: `generate`,
`stream`).
"""
