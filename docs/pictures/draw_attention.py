"""Draw the attention of a decoder layer, `attention.svg`: which tokens a text token and a vision token look at.

    python docs/pictures/draw_attention.py

Plain Python; the picture is the same every time. It shows a video of six blocks, shorter than any real one,
of which one token in the last block looks back.
"""

from pathlib import Path

WIDTH, HEIGHT = 920, 524
INK, FAINT, LINE = "#1f2430", "#6b7280", "#c9ced6"
TEXT, VISION = "#e9ecef", "#ffe3d3"
CMP, SLC, SWA, DENSE = "#2f9e44", "#1864ab", "#d9480f", "#495057"
TOKEN, LEFT = 13, 150  # width of a token; where the first one is
BLOCKS, BLOCK, BEFORE, AFTER = 6, 7, 3, 6  # blocks of the video, tokens in one, text tokens before and after
SELECTED, WINDOW = (2, 4), 5  # blocks that are selected before the token's own; tokens in the window
QUERY = BEFORE + BLOCK * (BLOCKS - 1) + 4  # the vision token that looks, in the last block


def text(
    x: float, y: float, words: str, size: int = 15, fill: str = INK, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{words}</text>'
    )


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}" {more}/>'


def at(token: int) -> float:
    return LEFT + TOKEN * token


def row(y: float, seen: dict[int, str], query: int, height: int = 22) -> list[str]:
    """The prompt's tokens; those that are seen in their colour, the one that looks in black."""
    parts = []
    for token in range(BEFORE + BLOCKS * BLOCK + AFTER):
        is_vision = BEFORE <= token < BEFORE + BLOCKS * BLOCK
        fill = INK if token == query else seen.get(token, VISION if is_vision else TEXT)
        faint = "" if token <= query else 'opacity="0.35"'
        parts.append(rectangle(at(token) + 0.5, y, TOKEN - 1, height, fill, "none", faint))
    return parts


def block_tokens(*blocks: int) -> list[int]:
    return [BEFORE + BLOCK * block + token for block in blocks for token in range(BLOCK)]


def branch(y: float, name: str, colour: str, seen: list[int], words: str, gate: str) -> list[str]:
    parts = [text(LEFT - 16, y + 16, name, 15, colour, "end", 600)]
    parts += row(y, dict.fromkeys(seen, colour), QUERY)
    end = at(BEFORE + BLOCKS * BLOCK + AFTER)
    parts += [text(LEFT, y + 41, words, 13, FAINT)]
    parts += [
        f'<circle cx="{end + 28}" cy="{y + 11}" r="13" fill="none" stroke="{colour}" stroke-width="2"/>',
        text(end + 28, y + 16, gate, 14, colour, "middle", 600),
        f'<path d="M {end + 42} {y + 11} L {end + 62} {y + 11}" stroke="{colour}" stroke-width="2"/>',
    ]
    return parts


def draw() -> str:
    end = at(BEFORE + BLOCKS * BLOCK + AFTER)
    parts = [rectangle(0, 0, WIDTH, HEIGHT, "#ffffff", "none")]
    parts += [text(24, 36, "What a token looks at in a decoder layer", 20, INK, weight=600)]
    # The prompt.
    first, last = at(BEFORE), at(BEFORE + BLOCKS * BLOCK)
    y = 78
    parts += [text(LEFT - 16, y + 16, "prompt", 15, INK, "end", 600)]
    parts += row(y, {}, 10**6)
    for block in range(BLOCKS):
        x = at(BEFORE + BLOCK * block)
        parts += [rectangle(x, y - 3, BLOCK * TOKEN, 28, "none", "#e8a680")]
    parts += [text((first + last) / 2, y - 10, "video: blocks of 64 tokens", 13, FAINT, "middle")]
    parts += [text((last + end) / 2, y - 10, "question", 13, FAINT, "middle")]
    # A text token.
    y = 152
    parts += [text(24, y, "A text token", 17, INK, weight=600)]
    asked = BEFORE + BLOCKS * BLOCK + 4
    parts += [text(LEFT - 16, y + 32, "dense", 15, DENSE, "end", 600)]
    parts += row(y + 16, dict.fromkeys(range(asked), "#868e96"), asked)
    parts += [text(LEFT, y + 57, "every token before it, as in Qwen2.5-VL", 13, FAINT)]
    # A vision token.
    y = 256
    parts += [text(24, y, "A vision token", 17, INK, weight=600)]
    parts += [text(160, y, "sees vision tokens only, in three ways that gates mix for every head", 14, FAINT)]
    y += 18
    complete = BLOCKS - 1
    parts += [text(LEFT - 16, y + 16, "compression", 15, CMP, "end", 600)]
    parts += row(y, {}, QUERY)
    for block in range(complete):
        x = at(BEFORE + BLOCK * block)
        parts += [rectangle(x + 1, y, BLOCK * TOKEN - 2, 22, CMP, "none", 'rx="4"')]
        parts += [text(x + BLOCK * TOKEN / 2, y + 16, "mean", 13, "#ffffff", "middle")]
    parts += [text(LEFT, y + 41, "the mean of each complete block", 13, FAINT)]
    parts += [
        f'<circle cx="{end + 28}" cy="{y + 11}" r="13" fill="none" stroke="{CMP}" stroke-width="2"/>',
        text(end + 28, y + 16, "g", 14, CMP, "middle", 600),
        f'<path d="M {end + 42} {y + 11} L {end + 62} {y + 11}" stroke="{CMP}" stroke-width="2"/>',
    ]
    own = [token for token in block_tokens(BLOCKS - 1) if token <= QUERY]
    y2 = y + 82
    for block in SELECTED:  # compression's probabilities choose what is selected
        x = at(BEFORE + BLOCK * block) + BLOCK * TOKEN / 2
        parts += [
            f'<path d="M {x} {y + 24} L {x} {y2 - 5}" stroke="{SLC}" stroke-width="2" stroke-dasharray="4 3" '
            'marker-end="url(#arrow)"/>'
        ]
    selected = block_tokens(*SELECTED) + own
    words = "the tokens of the blocks whose means mattered most (32 of them), its own among them"
    parts += branch(y2, "selection", SLC, selected, words, "g")
    y3 = y2 + 70
    window = list(range(QUERY - WINDOW + 1, QUERY))
    parts += branch(y3, "window", SWA, window, "the last 256 tokens", "g")
    # Their sum.
    x = end + 62
    parts += [
        f'<path d="M {x} {y + 11} L {x} {y3 + 11}" stroke="{INK}" stroke-width="2"/>',
        f'<circle cx="{x}" cy="{y2 + 11}" r="11" fill="#ffffff" stroke="{INK}" stroke-width="2"/>',
        text(x, y2 + 17, "+", 18, INK, "middle"),
    ]
    y = y3 + 78
    parts += [rectangle(24, y - 11, 12, 12, INK, "none"), text(42, y, "the token that looks", 13, FAINT)]
    parts += [rectangle(190, y - 11, 12, 12, VISION, "none"), text(208, y, "vision tokens", 13, FAINT)]
    parts += [rectangle(316, y - 11, 12, 12, TEXT, "none"), text(334, y, "text tokens", 13, FAINT)]
    parts += [text(430, y, "g: a gate between 0 and 1, of the token, head and branch", 13, FAINT)]
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{SLC}"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" '
        'aria-label="Text tokens attend to everything before them; vision tokens to means of blocks, selected blocks '
        'and a window, mixed by gates">'
    )
    return "\n".join([head, marker, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("attention.svg")
    path.write_text(draw())
    print(path)
