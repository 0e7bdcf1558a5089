"use strict";
// The text coloured by expert: choose text, router and which choice; point at, tap or walk to a token; pick experts.
for (const root of document.querySelectorAll(".tokens")) {
  const views = JSON.parse(root.querySelector("script").textContent);
  const experts = Number(root.dataset.experts);
  const [controls, legend, area, detail, shown] =
    [".controls", ".legend", ".text", ".detail", ".shown"].map((name) => root.querySelector(name));
  const state = { view: 0, router: Object.keys(views[0].routers)[0], rank: 0, at: -1, picked: -1 };
  const make = (tag, words, parent) => {
    const node = document.createElement(tag);
    node.textContent = words;
    parent.append(node);
    return node;
  };
  const routed = () => views[state.view].routers[state.router];
  const chosen = (index) => routed().e[index][state.rank] ?? -1;
  // A break shows its sign in the token; the break itself follows the token, so that its box stays on one line.
  const breaks = (piece) => piece.match(/\n*$/)[0];
  const show = (piece) => piece.slice(0, piece.length - breaks(piece).length).replace(/\r/g, "␍")
    .replace(/\t/g, "→   ").replace(/\n/g, "⏎\n") + "⏎".repeat(breaks(piece).length);

  const choice = (title, names, change) => {
    const label = make("label", title, controls);
    const list = document.createElement("select");
    label.append(list);
    list.addEventListener("change", () => { change(list.selectedIndex); draw(); });
    const fill = (words) => { list.replaceChildren(); words.forEach((word) => make("option", word, list)); };
    fill(names);
    return { list, fill };
  };
  const routers = () => Object.keys(views[state.view].routers);
  const ranks = () => routed().e[0].map((_, rank) => `choice ${rank + 1}`);
  const texts = choice("Text", views.map((view) => view.domain), (index) => { state.view = index; });
  const layers = choice("Router", routers(), (index) => { state.router = routers()[index]; });
  const places = choice("Colour by", ranks(), (index) => { state.rank = index; });
  const label = make("label", "", controls);
  label.className = "check";
  const box = document.createElement("input");
  box.type = "checkbox";
  label.append(box, "expert numbers");
  box.addEventListener("change", () => root.classList.toggle("numbers", box.checked));

  const tell = () => {
    for (const old of area.querySelectorAll(".on")) old.classList.remove("on");
    if (state.at < 0) { detail.textContent = "Point at or tap a token for its experts and weights."; return; }
    const span = area.children[state.at];
    span.classList.add("on");
    detail.replaceChildren();
    const piece = views[state.view].pieces[state.at];
    make("strong", `Token ${state.at + 1} ${piece === " " ? "space" : `“${show(piece)}”`} `, detail);
    const { e, w } = routed();
    e[state.at].forEach((expert, rank) => {
      const words = expert < 0 ? "dropped" : `expert ${expert} · weight ${(w[state.at][rank] ?? 0).toFixed(3)}`;
      const chip = make("span", words, detail);
      chip.className = expert < 0 ? "dropped" : `chip e${expert}`;
    });
  };

  const pick = () => {
    root.classList.toggle("dim", state.picked >= 0);
    const { e } = routed();
    [...area.children].forEach((span, index) => {
      const hit = state.picked >= 0 && e[index].includes(state.picked);
      const expert = hit ? state.picked : chosen(index);
      span.className = "t" + (expert >= 0 ? ` e${expert}` : "") + (hit ? " hit" : "") +
        (index === state.at ? " on" : "");
    });
    for (const button of legend.children) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.expert) === state.picked));
    }
  };

  const drawLegend = () => {
    const counts = new Array(experts).fill(0);
    for (const token of routed().e) for (const expert of token) if (expert >= 0) counts[expert] += 1;
    legend.replaceChildren();
    counts.forEach((count, expert) => {
      const button = make("button", String(expert), legend);
      button.type = "button";
      button.dataset.expert = String(expert);
      button.className = count ? `e${expert}` : "unused";
      const share = (100 * count / routed().e.length).toFixed(1);
      button.title = `expert ${expert}: selected by ${share} % of these tokens`;
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", () => { state.picked = state.picked === expert ? -1 : expert; pick(); });
    });
  };

  function draw() {
    if (!routers().includes(state.router)) state.router = routers()[0];
    state.rank = Math.min(state.rank, ranks().length - 1);
    layers.fill(routers());
    layers.list.value = state.router;
    places.fill(ranks());
    places.list.selectedIndex = state.rank;
    state.at = -1;
    const pieces = views[state.view].pieces;
    const fragment = document.createDocumentFragment();
    pieces.forEach((piece, index) => {
      const span = make("span", show(piece), fragment);
      const expert = chosen(index);
      span.dataset.i = String(index);
      span.dataset.e = expert >= 0 ? String(expert) : "–";
      fragment.append(breaks(piece));
    });
    area.replaceChildren(fragment);
    const used = new Set(pieces.map((_, index) => chosen(index)).filter((expert) => expert >= 0));
    shown.textContent = `${used.size} of ${experts} experts colour this text. Tap an expert below to see only the ` +
      "tokens that select it, at any choice.";
    drawLegend();
    pick();
    tell();
  }

  const point = (event) => {
    const span = event.target.closest(".t");
    if (span && Number(span.dataset.i) !== state.at) { state.at = Number(span.dataset.i); tell(); }
  };
  area.addEventListener("mouseover", point);
  area.addEventListener("click", point);
  area.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    state.at = Math.min(Math.max(state.at + step, 0), area.children.length - 1);
    tell();
    area.children[state.at].scrollIntoView({ block: "nearest" });
  });
  if (views.length < 2) texts.list.parentNode.hidden = true;
  controls.hidden = false;
  legend.hidden = false;
  draw();
}
