// Of the part that takes a video: `element` and `trigger` are Gradio's.
const part = (selector) => element.querySelector(selector);
const say = (text) => {
  const problem = part(".problem");
  problem.textContent = text;
  problem.hidden = !text;
};

let running = null;
const send = (file) => {
  if (running) running.abort();
  say("");
  const bar = part(".drop-bar");
  const request = new XMLHttpRequest();
  running = request;
  request.open("PUT", `${part(".choose").dataset.address}?name=${encodeURIComponent(file.name)}`);
  request.upload.onprogress = (event) => {
    bar.firstElementChild.style.width = `${(100 * event.loaded) / event.total}%`;
  };
  bar.hidden = false;
  request.onloadend = () => {
    if (running !== request) return;
    running = null;
    bar.hidden = true;
    bar.firstElementChild.style.width = "0";
    if (request.status === 200) return trigger("upload");
    let text = "The file did not arrive. Is the connection still there?";
    try {
      text = JSON.parse(request.responseText).error;
    } catch {} // the connection broke, or a proxy answered
    say(text);
  };
  request.send(file);
};

element.addEventListener("change", (event) => {
  if (event.target.type === "file" && event.target.files.length) send(event.target.files[0]);
  event.target.value = "";
});
element.addEventListener("click", (event) => {
  const example = event.target.closest("[data-example]");
  if (!example) return;
  say("");
  for (const one of element.querySelectorAll("[data-example]")) one.setAttribute("aria-pressed", one === example);
  trigger("select", { index: Number(example.dataset.example) });
});
for (const name of ["dragenter", "dragover"]) {
  element.addEventListener(name, (event) => {
    event.preventDefault();
    part(".drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  element.addEventListener(name, (event) => {
    event.preventDefault();
    part(".drop").classList.remove("over");
    if (event.dataTransfer.files.length && name === "drop") send(event.dataTransfer.files[0]);
  });
}
