// Shows a text as a sequence of tokens in `element`. The method `add` appends a token. The user chooses a token with
// the mouse, a tap or an arrow key, and then `choose` is called with the index of this token.
function tokenFlow(element, tokens, choose) {
  const spans = [];
  let chosen = -1;
  function add(token) {
    const span = document.createElement("span");
    span.textContent = visible(token);
    if (token.startsWith("⟨")) span.dir = "ltr";  // bytes keep their order in right-to-left text
    span.dataset.token = spans.length;
    spans.push(span);
    element.append(span);
    return span;
  }
  function clear() {
    element.replaceChildren();
    spans.length = 0;
    chosen = -1;
  }
  function select(i) {
    spans[chosen]?.removeAttribute("aria-current");
    chosen = i;
    spans[i].setAttribute("aria-current", "true");
    choose(i);
  }
  element.tabIndex = 0;
  const chooseUnder = (event) => {
    const i = event.target.dataset.token;
    if (i !== undefined) select(Number(i));
  };
  element.addEventListener("pointerover", chooseUnder);
  element.addEventListener("click", chooseUnder);
  element.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !spans.length) return;
    event.preventDefault();
    select(Math.min(spans.length - 1, Math.max(0, chosen + step)));
  });
  tokens.forEach(add);
  return { spans, add, clear, select, chosen: () => chosen };
}

function visible(token) {
  return token
    .replace(/(?![\r\t\n])[\p{Cc}\p{Cf}]/gu, (c) => `⟨U+${c.codePointAt().toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replaceAll("\r", "␍").replaceAll("\t", "⇥").replaceAll("\n", "⏎\n");
}

// A token inside a sentence. dir="auto" keeps a right-to-left token from changing the direction of the sentence.
function quoted(token) {
  const code = document.createElement("code");
  code.dir = "auto";
  code.textContent = token.startsWith("⟨") ? token : visible(token).replaceAll("⏎\n", "⏎").replaceAll(" ", "␣");
  return code;
}

function heading(element, text, token) {
  const title = document.createElement("h3");
  title.append(text, " ", quoted(token));
  element.append(title);
}

// Adds a table with a heading row. Each cell is a text or an element.
function table(element, headings, rows) {
  const made = document.createElement("table");
  const top = made.createTHead().insertRow();
  for (const name of headings) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    top.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const content of row) line.insertCell().append(content);
  }
  element.append(made);
}

// A background color for a fraction in 0..1 that keeps the text readable. The square root keeps small fractions visible.
function shade(name, fraction) {
  return `rgba(var(--${name}), ${(0.6 * Math.sqrt(Math.min(1, fraction))).toFixed(4)})`;
}

const percent = (fraction) => `${(100 * fraction).toFixed(fraction < 0.1 ? 2 : 1)} %`;
