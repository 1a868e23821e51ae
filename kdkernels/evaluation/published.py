"""Rows published with the two measures (arXiv 2501.12619), to stand beside one's own.

They were scored by another judge on other prompts: compare orders, not digits.
"""

from __future__ import annotations

RSE = {
    "Llama3.1-70B-Instruct": {"ArenaHard": 3.435, "Numina": 3.726, "ShareGPT": 3.723, "mean": 3.628},
    "Claude3.5-Sonnet": {"ArenaHard": 3.466, "Numina": 4.114, "ShareGPT": 3.641, "mean": 3.740},
    "Qwen-Max-0919": {"ArenaHard": 3.888, "Numina": 4.342, "ShareGPT": 4.293, "mean": 4.174},
    "GPT4o-0513": {"ArenaHard": 4.086, "Numina": 4.312, "ShareGPT": 4.323, "mean": 4.240},
    "GPT4o-0806 (the reference)": {"ArenaHard": 5.0, "Numina": 5.0, "ShareGPT": 5.0, "mean": 5.0},
}
ICE = {
    "Claude": {"loose": 0.01, "strict": 0.00},
    "Doubao": {"loose": 0.04, "strict": 0.01},
    "Gemini": {"loose": 0.24, "strict": 0.04},
    "Llama3.1-70B": {"loose": 0.31, "strict": 0.10},
    "Phi4": {"loose": 0.22, "strict": 0.14},
    "DeepSeek-V3": {"loose": 0.34, "strict": 0.22},
    "Qwen-Max": {"loose": 0.34, "strict": 0.25},
    "GLM4-Plus": {"loose": 0.42, "strict": 0.30},
}
