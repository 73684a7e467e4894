const T = data.tokens.length, triangle = (T * (T + 1)) / 2;
const packed = Uint8Array.from(atob(data.weights), (character) => character.charCodeAt(0));
let layer = 0, heads = new Set([...Array(data.heads).keys()]);

// 255 times the square root of the attention weight from token t to token s
function root(layer, head, t, s) {
  return packed[(layer * data.heads + head) * triangle + (t * (t + 1)) / 2 + s];
}

function weightsOf(t) {
  return Array.from({ length: t + 1 }, (_, s) =>
    [...heads].reduce((sum, head) => sum + (root(layer, head, t, s) / 255) ** 2, 0) / heads.size);
}

const flow = tokenFlow(document.getElementById("flow"), data.tokens, showToken);
const panel = document.getElementById("panel");

function showToken(t) {
  const weights = weightsOf(t);
  const highest = Math.max(...weights);
  flow.spans.forEach((span, s) => { span.style.background = s <= t ? shade("mark", weights[s] / highest) : ""; });
  panel.replaceChildren();
  heading(panel, `Token ${t}`, data.tokens[t]);
  const most = weights.map((weight, s) => [weight, s]).sort((a, b) => b[0] - a[0]).slice(0, 10);
  table(panel, ["attends to", "position", "weight"], most.map(([weight, s]) => [quoted(data.tokens[s]), String(s), percent(weight)]));
}

// ---- selection of layer and heads

const headButtons = [...document.querySelectorAll("[data-head]")];
const pictures = [];
const layerChoice = document.getElementById("layer");

function showChoice() {
  layerChoice.value = layer;
  headButtons.forEach((button, head) => button.setAttribute("aria-pressed", heads.has(head)));
  for (const { button, at, head } of pictures) button.setAttribute("aria-pressed", at === layer && heads.has(head));
  showToken(flow.chosen());
}

layerChoice.addEventListener("change", () => { layer = Number(layerChoice.value); showChoice(); });
document.getElementById("all").addEventListener("click", () => { heads = new Set(headButtons.keys()); showChoice(); });
headButtons.forEach((button, head) => button.addEventListener("click", () => {
  if (heads.size === data.heads) heads = new Set([head]);  // the first click after "all" selects a single head
  else if (!heads.delete(head) || heads.size === 0) heads.add(head);
  showChoice();
}));

// ---- model view

function draw(canvas, at, head) {
  canvas.width = canvas.height = T;
  const context = canvas.getContext("2d"), image = context.createImageData(T, T);
  for (let t = 0; t < T; t++)
    for (let s = 0; s <= t; s++)
      // The weight is the opacity. On a dark page, the style sheet increases the brightness.
      image.data.set([40, 130, 210, root(at, head, t, s)], 4 * (t * T + s));
  context.putImageData(image, 0, 0);
}

const grid = document.getElementById("model");
function label(text, className) {
  const span = document.createElement("span");
  span.textContent = text;
  span.className = className;
  grid.append(span);
}
label("head", "");
for (let head = 0; head < data.heads; head++) label(head, "head");
for (let at = 0; at < data.layers; at++) {
  label(`layer ${at}`, "");
  for (let head = 0; head < data.heads; head++) {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.type = "button";
    button.setAttribute("aria-label", `layer ${at}, head ${head}`);
    button.title = `layer ${at}, head ${head}`;
    button.append(canvas);
    draw(canvas, at, head);
    button.addEventListener("click", () => {
      layer = at;
      heads = new Set([head]);
      showChoice();
      document.getElementById("head-view").scrollIntoView();
    });
    grid.append(button);
    pictures.push({ button, at, head });
  }
}
showChoice();
flow.select(T - 1);
