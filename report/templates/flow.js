// A text in tokens. A token is chosen by hovering, a tap, or the arrow keys; `choose` is told its number.
function tokenFlow(element, tokens, choose) {
  const spans = tokens.map((token) => {
    const span = document.createElement("span");
    span.textContent = visible(token);
    if (token.startsWith("⟨")) span.dir = "ltr";  // bytes keep their order in a text from right to left
    element.append(span);
    return span;
  });
  let chosen = 0;
  function select(i) {
    spans[chosen].removeAttribute("aria-current");
    chosen = i;
    spans[i].setAttribute("aria-current", "true");
    choose(i);
  }
  element.tabIndex = 0;
  const chooseUnder = (event) => {
    const i = spans.indexOf(event.target);
    if (i >= 0) select(i);
  };
  element.addEventListener("pointerover", chooseUnder);
  element.addEventListener("click", chooseUnder);
  element.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    select(Math.min(spans.length - 1, Math.max(0, chosen + step)));
  });
  return { spans, select, chosen: () => chosen };
}

function visible(token) {
  return token
    .replace(/(?![\r\t\n])[\p{Cc}\p{Cf}]/gu, (c) => `⟨U+${c.codePointAt().toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replaceAll("\r", "␍").replaceAll("\t", "⇥").replaceAll("\n", "⏎\n");
}

// A token between other words: whatever its direction, they keep theirs.
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

// rows of cells, each a text or an element; a share in 0..1 colours its row's first cell
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

// 0..1 as a background that text stays readable on; the square root keeps small shares visible
function shade(name, share) {
  return `rgba(var(--${name}), ${(0.6 * Math.sqrt(Math.min(1, share))).toFixed(4)})`;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;
