"""Style and scripts of the pages that `mdnet_dist.explain` writes. Constants: their hashes are the pages' policy."""

STYLE = """
:root{color-scheme:light;--ink:#1b1b1b;--line:#767676;--link:#004e8a;--accent:#0072b2}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;font:1rem/1.45 system-ui,sans-serif;color:var(--ink);background:#fff}
h1{font-size:1.35rem;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:.6rem 0}h3{font-size:1rem;margin:0}
p{margin:.35rem 0}a{color:var(--link)}.crumbs a{margin-right:1rem}
button{font:inherit;color:inherit;cursor:pointer}
:focus-visible{outline:3px solid var(--accent);outline-offset:1px}
main{display:grid;grid-template-columns:clamp(15rem,75vh,27rem) minmax(0,1fr);gap:1.5rem;align-items:start}
.viewer{position:sticky;top:.5rem;background:#fff;z-index:1}
.stage{position:relative;width:100%;aspect-ratio:1;border:1px solid var(--line)}
.base{background-size:100% 100%}
.stage>img,.thumb>img{position:absolute;inset:0;width:100%;height:100%}
.stage.mapped::before{content:"";position:absolute;inset:0;background:inherit;filter:grayscale(1)}
.thumb .base{position:absolute;inset:0;filter:grayscale(1)}
#outline:not([src]),[hidden]{display:none!important}
#caption{min-height:3.1em}
.scale{display:flex;gap:.5rem;align-items:center;font-size:.9rem;min-height:1.5em}
.scale{white-space:nowrap}.scale img{width:9rem;min-width:3rem;height:.8rem;border:1px solid var(--line)}
.topic{display:grid;grid-template-columns:6.5rem minmax(0,1fr);gap:.8rem;padding:.7rem 0;border-top:1px solid #d0d0d0}
.thumb{position:relative;display:block;width:6.5rem;height:6.5rem;padding:0;overflow:hidden}
.thumb{border:1px solid var(--line);background:#fff}
.sentence{line-height:2}
.word{padding:.1rem .3rem;border:1px solid transparent;border-radius:.25rem;background:none}
.word{border-bottom:2px dotted var(--accent)}
.shown.word{background:#ffe9b0;border-color:var(--ink)}.shown.thumb,.class.shown .thumb{outline:3px solid #e69f00}
[aria-pressed=true].word{border-style:solid;font-weight:600}
.people{font-size:.88rem;color:#4a4a4a;margin:.1rem 0}ul.people{padding-left:1.1rem}
.classes{display:flex;flex-wrap:wrap;gap:1rem}
.class{display:grid;gap:.25rem;width:8.5rem;padding:.3rem;text-align:left;place-items:start;align-content:start}
.class{border:1px solid transparent;background:none}
.class[aria-pressed=true]{border-color:var(--ink)}.class meter{width:100%}.name{overflow-wrap:anywhere}
.right{color:#00664a;font-weight:600}.wrong{color:#a33f00;font-weight:600}
.sorts{display:flex;flex-wrap:wrap;gap:.4rem;align-items:center}
.sorts button{padding:.3rem .7rem;border:1px solid var(--line);border-radius:.3rem;background:#fff}
.sorts button[aria-pressed=true]{background:var(--accent);color:#fff}
.cards{list-style:none;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:1rem}
.cards a{display:grid;gap:.1rem;text-decoration:none;color:inherit;font-size:.9rem;overflow-wrap:anywhere}
.cards b{color:var(--link);text-decoration:underline}.cards img{width:7rem;height:7rem;border:1px solid var(--line)}
footer{margin-top:1.5rem;border-top:1px solid #d0d0d0;padding-top:.5rem;font-size:.9rem}
@media (max-width:48rem){
 main{grid-template-columns:minmax(0,1fr);gap:.5rem}
 .viewer{top:0;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
 .stage{width:min(100%,36vh);margin:auto}
 .scale img{width:6rem}
 .topic button,.class{scroll-margin-top:56vh}
 #caption{font-size:.85rem;min-height:2.9em}
 .topic{grid-template-columns:4.5rem minmax(0,1fr)}.topic .thumb{width:4.5rem;height:4.5rem}
 .class{width:calc(50% - .5rem)}
}
@media (pointer:coarse){.word{padding:.45rem .5rem}.sentence{line-height:2.7}}
"""

PAGE_SCRIPT = """
"use strict";
(() => {
  const byId = (name) => document.getElementById(name);
  const stage = byId("stage"), overlay = byId("overlay"), caption = byId("caption"), outline = byId("outline");
  const sources = [...document.querySelectorAll("[data-map]")];
  const idle = caption.textContent, plain = stage.getAttribute("aria-label");
  let kept = null;
  const show = (source) => {
    for (const other of sources) other.classList.toggle("shown", other === source);
    overlay.hidden = !source;
    stage.classList.toggle("mapped", Boolean(source));
    caption.textContent = source ? source.dataset.caption : idle;
    stage.setAttribute("aria-label", source ? source.dataset.caption : plain);
    if (source) overlay.src = source.dataset.map; else overlay.removeAttribute("src");
    for (const scale of document.querySelectorAll(".scale")) {
      scale.hidden = !source || scale.dataset.of !== source.dataset.scale;
      if (scale.hidden) continue;
      scale.querySelector(".low").textContent = source.dataset.low;
      scale.querySelector(".high").textContent = source.dataset.high;
    }
  };
  const keep = (source) => {
    kept = source;
    for (const other of sources) other.setAttribute("aria-pressed", String(other === kept));
    show(kept);
  };
  sources.forEach((source, number) => {
    source.addEventListener("mouseenter", () => show(source));
    source.addEventListener("mouseleave", () => show(kept));
    source.addEventListener("focus", () => show(source));
    source.addEventListener("blur", () => show(kept));
    source.addEventListener("click", () => keep(kept === source ? null : source));
    source.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (step && sources[number + step]) { sources[number + step].focus(); event.preventDefault(); }
    });
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") keep(null); });
  const annotated = byId("annotated");
  if (annotated) annotated.addEventListener("change", () => { outline.hidden = !annotated.checked; });
})();
"""

INDEX_SCRIPT = """
"use strict";
(() => {
  const cards = document.getElementById("cards"), order = document.getElementById("order");
  const buttons = [...document.querySelectorAll("[data-sort]")];
  const names = {error: ["smallest first", "largest first"], confidence: ["least sure first", "surest first"],
                 name: ["A to Z", "Z to A"]};
  let by = buttons[0].dataset.sort, falling = by === "error";
  const compare = (one, other) => {
    if (by === "name") return one.dataset.name.localeCompare(other.dataset.name, undefined, {numeric: true});
    return Number(one.dataset[by]) - Number(other.dataset[by]);
  };
  const sort = () => {
    const known = [...cards.children].filter((card) => card.dataset[by] !== undefined).sort(compare);
    const unknown = [...cards.children].filter((card) => card.dataset[by] === undefined);
    if (falling) known.reverse();
    cards.replaceChildren(...known, ...unknown);
    order.textContent = names[by][Number(falling)];
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.sort === by));
  };
  for (const button of buttons) button.addEventListener("click", () => {
    falling = button.dataset.sort === by ? !falling : button.dataset.sort === "error";
    by = button.dataset.sort;
    sort();
  });
  sort();
})();
"""
