// shade() takes the square root of its fraction. It is squared here, so that the color is proportional to the loss.
const lossShade = (loss) => shade("loss", Math.min(1, loss / data.uniformLoss) ** 2);
document.querySelector(".bar").style.background =
  `linear-gradient(to right, ${[0, 1].map((fraction) => lossShade(fraction * data.uniformLoss)).join(", ")})`;

const layerNames = data.lensTokens.map((_, layer) => (layer === 0 ? "embeddings" : `block ${layer - 1}`));
const flow = tokenFlow(document.getElementById("flow"), data.tokens, showToken);
flow.spans.forEach((span, t) => { span.style.background = lossShade(data.losses[t]); });

// ---- logit lens: one row per layer, the last layer on top

const lens = document.getElementById("lens");
const top_ = lens.createTHead().insertRow();
top_.append(document.createElement("th"));
const columns = data.tokens.map((token) => {
  const cell = document.createElement("th");
  cell.scope = "col";
  cell.append(quoted(token));
  top_.append(cell);
  return [cell];
});
const body = lens.createTBody();
for (let layer = layerNames.length - 1; layer >= 0; layer--) {
  const row = body.insertRow(), name = document.createElement("th");
  name.scope = "row";
  name.textContent = layerNames[layer];
  row.append(name);
  data.tokens.forEach((token, t) => {
    const cell = row.insertCell(), label = data.labels[data.lensTokens[layer][t]];
    cell.append(quoted(label));
    cell.style.background = shade("mark", data.lensProbabilities[layer][t] ** 2);
    if (label === token) cell.className = "right";
    cell.addEventListener("pointerover", () => flow.select(t));
    columns[t].push(cell);
  });
}

// ---- predictions at the position of a token

const panel = document.getElementById("panel");
let marked = [];
function showToken(t) {
  panel.replaceChildren();
  heading(panel, `Token ${t}`, data.tokens[t]);
  const description = document.createElement("p");
  const rank = data.ranks[t] === 0 ? "the most probable token" : `${data.ranks[t].toLocaleString("en")} tokens were more probable`;
  description.textContent = `loss ${data.losses[t].toFixed(4)} nats, probability ${percent(Math.exp(-data.losses[t]))}; ${rank}`;
  panel.append(description);
  table(panel, ["prediction", "probability"],
    data.alternatives[t].map((token, i) => [quoted(data.labels[token]), percent(data.probabilities[t][i])]));
  table(panel, ["after", "prediction", "probability", "actual token"], layerNames.map((name, layer) => [
    name, quoted(data.labels[data.lensTokens[layer][t]]), percent(data.lensProbabilities[layer][t]),
    percent(data.lensActual[layer][t]),
  ]));
  for (const cell of marked) cell.removeAttribute("aria-current");
  marked = columns[t];
  for (const cell of marked) cell.setAttribute("aria-current", "true");
}
flow.select(0);
