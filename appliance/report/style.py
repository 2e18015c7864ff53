"""The report's only style: no file, font or script from anywhere. Dark and light follow the reader's system; printing is light."""

from __future__ import annotations

from typing import Final

# Okabe and Ito's colours, which the colour-blind can tell apart, darkened or lightened for contrast with each background.
_LIGHT: Final = ("#0067a5", "#c75100", "#00795a", "#a8588a", "#8a6d00", "#3a7ca5")
_DARK: Final = ("#56b4e9", "#e69f00", "#2bc49a", "#d98fc0", "#f0e442", "#8fc7ee")
_STATES: Final = 11

_COMMON = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1480px;padding:1rem;font:15px/1.45 system-ui,sans-serif;background:var(--bg);color:var(--fg)}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:1.6rem 0 .5rem;border-bottom:1px solid var(--grid);padding-bottom:.2rem}
.dim{color:var(--dim)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.6rem}
.tile{background:var(--card);border-radius:8px;padding:.6rem .8rem}.tile b{display:block;font-size:1.3rem;font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:.8rem}
figure{margin:0;background:var(--card);border-radius:8px;padding:.6rem}figcaption{font-weight:600;margin-bottom:.3rem}
.keys{font-weight:400;font-size:.85rem;color:var(--dim)}.key{margin-left:.8rem;white-space:nowrap}
.key::before{content:"";display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.35em;background:var(--c)}
svg{display:block;width:100%;height:auto}.tick{font-size:10px;fill:var(--dim)}.grid{stroke:var(--grid);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.dot,rect{fill:var(--c)}
.limit{stroke:var(--bad);stroke-width:1.2;stroke-dasharray:5 4}.mark line{stroke:var(--bad);stroke-width:2;opacity:.7}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;padding:.28rem .6rem;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--dim);font-weight:600;white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}code{font-size:.85em;overflow-wrap:anywhere}
.waterfall{width:100%;min-width:220px;height:14px}td.bar{width:32%}ul{padding-left:1.2rem}li{margin:.25rem 0}
"""
_LIGHT_NAMES = "--bg:#fff;--fg:#1b1f24;--dim:#5b6570;--card:#f4f6f8;--grid:#d9dee3;--bad:#c1121f"
_DARK_NAMES = "--bg:#14171a;--fg:#e6e9ec;--dim:#9aa4ae;--card:#1d2125;--grid:#343a40;--bad:#ff6b6b"


def stylesheet() -> str:
    """The whole style sheet."""
    light, dark = _colours(_LIGHT), _colours(_DARK)
    states = "".join(f".w{i}{{--c:hsl({(i * 360 // _STATES * 4) % 360} 62% var(--l))}}" for i in range(_STATES))
    return (
        f":root{{color-scheme:light dark;{_LIGHT_NAMES};--l:45%}}{_COMMON}{light}{states}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK_NAMES};--l:62%}}{dark}}}"
        "@media print{body{max-width:none}figure,tr{break-inside:avoid}}"
    )


def _colours(colours: tuple[str, ...]) -> str:
    return "".join(f".s{index}{{--c:{colour}}}" for index, colour in enumerate(colours))
