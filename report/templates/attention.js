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

// ---- the matrix of the chosen layer and heads: a row for each token, a column for each token that it attends to

const matrix = document.getElementById("matrix");
const cell = Math.max(2, Math.min(26, Math.floor(620 / T)));  // pixels
const labels = cell >= 11 ? data.tokens.map((token) => quoted(token).textContent) : [];
const context = matrix.getContext("2d");
const font = `${Math.min(13, cell - 1)}px system-ui, sans-serif`;
let margin = 0;

function drawMatrix() {
  context.font = font;
  margin = Math.ceil(Math.max(0, ...labels.map((label) => Math.min(140, context.measureText(label).width))) + (labels.length && 8));
  const side = margin + T * cell, ratio = devicePixelRatio;
  matrix.width = matrix.height = side * ratio;
  matrix.style.width = matrix.style.height = `${side}px`;
  context.scale(ratio, ratio);
  context.font = font;
  context.textBaseline = "middle";
  context.fillStyle = color("--text");
  labels.forEach((label, i) => {
    context.textAlign = "right";
    context.fillText(label, margin - 5, margin + (i + 0.5) * cell, margin - 5);
    context.save();
    context.translate(margin + (i + 0.5) * cell, margin - 5);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(label, 0, 0, margin - 5);
    context.restore();
  });
  const gap = cell >= 6 ? 1 : 0;
  for (let t = 0; t < T; t++)
    weightsOf(t).forEach((weight, s) => {
      context.fillStyle = `rgba(${color("--mark")}, ${Math.max(0.04, Math.sqrt(weight))})`;
      context.fillRect(margin + s * cell, margin + t * cell, cell - gap, cell - gap);
    });
  const chosen = heads.size === data.heads ? "the mean of all heads" : `head ${[...heads].sort((a, b) => a - b).join(", ")}`;
  const text = `Layer ${layer}, ${chosen}: each row is a token, each column a token that it attends to.`;
  document.getElementById("shown").textContent = `${text} Move over the matrix to choose a token.`;
  matrix.setAttribute("aria-label", text);
}

function chooseInMatrix(event) {
  const t = Math.floor((event.offsetY - margin) / cell), s = Math.floor((event.offsetX - margin) / cell);
  if (t < 0 || t >= T) return;
  flow.select(t);
  matrix.title = s >= 0 && s <= t ? `${labels[t] ?? t} attends to ${labels[s] ?? s}: ${percent(weightsOf(t)[s])}` : "";
}
matrix.addEventListener("pointermove", chooseInMatrix);
matrix.addEventListener("click", chooseInMatrix);

// ---- selection of layer and heads

const headButtons = [...document.querySelectorAll("[data-head]")];
const pictures = [];
const layerChoice = document.getElementById("layer");

function showChoice() {
  layerChoice.value = layer;
  headButtons.forEach((button, head) => button.setAttribute("aria-pressed", heads.has(head)));
  for (const { button, at, head } of pictures) button.setAttribute("aria-pressed", at === layer && heads.has(head));
  showToken(flow.chosen());
  drawMatrix();
}

layerChoice.addEventListener("change", () => { layer = Number(layerChoice.value); showChoice(); });
document.getElementById("all").addEventListener("click", () => { heads = new Set(headButtons.keys()); showChoice(); });
headButtons.forEach((button, head) => button.addEventListener("click", () => {
  if (heads.size === data.heads) heads = new Set([head]);  // the first click after "all" selects a single head
  else if (!heads.delete(head) || heads.size === 0) heads.add(head);
  showChoice();
}));

// ---- model view

function drawThumbnail(canvas, at, head) {
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
    drawThumbnail(canvas, at, head);
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
flow.select(T - 1);
showChoice();
drawAndFollowTheme(drawMatrix);
