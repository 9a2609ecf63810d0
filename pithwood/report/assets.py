"""Style sheet and script of the report; both stand in the page itself, which asks the network for nothing."""

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1f2937;--soft:#5b6472;--rule:#d9dde3;--panel:#f6f7f9;--cell:#1f5fa8;
--past:#e6eaf0;--alarm:#b42318;--c0:#1f6fc4;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce;--c4:#a16207;--c5:#0e7490}
@media (prefers-color-scheme:dark){:root{--ground:#12161c;--ink:#e5e9ef;--soft:#9aa5b4;--rule:#333c48;--panel:#1a2028;
--cell:#7cb8f7;--past:#232b36;--alarm:#ff8a7a;--c0:#6cb2ff;--c1:#ff9b63;--c2:#5fd38a;--c3:#c79bff;--c4:#e5c04f;
--c5:#4fd0e0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:1180px;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .4rem;padding-top:.6rem;
border-top:1px solid var(--rule)}h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.3rem 0;max-width:75ch}.soft,figure p,.none{color:var(--soft);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem}a{color:var(--c0)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.6rem;margin:.8rem 0}
.tile{background:var(--panel);border-radius:8px;padding:.55rem .75rem}.tile b{display:block;font-size:1.2rem}
.tile span{color:var(--soft);font-size:.8rem}
figure{margin:0;min-width:0}figure.wide{grid-column:1/-1;margin:.4rem 0}
figure.loads{max-width:640px}figcaption{font-weight:600;font-size:.9rem}
figure>svg{display:block;width:100%;height:auto;touch-action:pan-y}
.maps{display:flex;flex-wrap:wrap;gap:1rem}.map{width:240px}
svg text{fill:var(--soft);font-size:11px;font-family:inherit}text.y{text-anchor:end}text.x{text-anchor:middle}
svg line.grid{stroke:var(--rule);stroke-width:1}.cursor{stroke:var(--soft);stroke-width:1}
.mark{stroke:var(--alarm);stroke-width:1;stroke-dasharray:2 3}
path{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}path.faint{opacity:.3;stroke-width:1}
path.dashed{stroke-dasharray:6 4;stroke-width:1.3}path.points{stroke-width:1.3}.dots{fill:currentColor}
.s0{color:var(--c0)}.s1{color:var(--c1)}.s2{color:var(--c2)}.s3{color:var(--c3)}.s4{color:var(--c4)}.s5{color:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:0 .9rem;font-size:.8rem;min-height:1.3em}
.legend output{color:var(--soft)}
.key::before{content:"";display:inline-block;width:1.1em;height:.2em;margin-right:.35em;vertical-align:middle;background:currentColor}.key.points::before{width:.55em;height:.55em;border-radius:50%}
.key.dashed::before{background:repeating-linear-gradient(90deg,currentColor 0 4px,transparent 4px 7px)}
.map rect,.load{fill:var(--cell)}.past{fill:var(--past)}.dead{fill:none;stroke:var(--alarm)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;margin:.3rem 0}
caption{text-align:left;font-weight:600;padding:.2rem 0}
th,td{padding:.22rem .7rem .22rem 0;text-align:right;border-bottom:1px solid var(--rule);overflow-wrap:normal}
th:first-child,td:first-child,.left td,.left th{text-align:left}th{font-weight:600;color:var(--soft)}
pre{background:var(--panel);border-radius:8px;padding:.7rem;overflow-x:auto;white-space:pre-wrap;font-size:.85rem;
max-height:32rem;overflow-y:auto}summary{cursor:pointer;padding:.25rem 0}
@media (max-width:600px){figure.wide svg text{font-size:20px}}
@media print{details{display:block}pre{max-height:none}}
"""

SCRIPT = """
"use strict";
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const data = JSON.parse(svg.dataset.lines), cursor = svg.querySelector(".cursor");
  const output = svg.parentElement.querySelector("output");
  const short = n => n >= 1e9 ? (n / 1e9).toFixed(2) + "B" : n >= 1e6 ? (n / 1e6).toFixed(2) + "M"
    : n >= 1e3 ? (n / 1e3).toFixed(1) + "k" : String(Math.round(n));
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const at = Math.min(Math.max((event.clientX - box.left) * scale, data.left), data.right);
    const wanted = (at - data.left) / (data.right - data.left) * data.most;
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); cursor.setAttribute("visibility", "visible");
    const parts = [];
    for (const line of data.lines) {
      let best = -1;
      line.x.forEach((x, i) => { if (best < 0 || Math.abs(x - wanted) < Math.abs(line.x[best] - wanted)) best = i; });
      if (best >= 0) parts.push((data.lines.length > 1 ? line.name + " " : "") + line.y[best]);
    }
    output.textContent = "at " + short(wanted) + " tokens: " + parts.join(", ");
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); output.textContent = ""; });
}
"""
