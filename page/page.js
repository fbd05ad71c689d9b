// Clicks on evidence move the video; the timeline follows it. Loaded once, so that re-rendered parts need no listeners.
(() => {
  const video = () => document.querySelector(".stage video");

  document.addEventListener("click", (event) => {
    const target = event.target.closest?.("[data-second]");
    const film = video();
    if (!target || !film) return;
    film.pause();
    film.currentTime = Number(target.dataset.second) + 0.01; // inside the frame, not at its edge
    const box = film.getBoundingClientRect();
    if (box.top < 0 || box.bottom > innerHeight) film.scrollIntoView({ behavior: "smooth", block: "center" });
  });

  // These events do not bubble.
  document.addEventListener("timeupdate", (event) => {
    const needle = document.querySelector(".needle");
    const total = Number(needle?.parentElement.dataset.total); // of what was read, which may end before the video
    if (total && event.target === video()) {
      needle.style.left = `${Math.min(100, (100 * event.target.currentTime) / total)}%`;
    }
  }, true);

  document.addEventListener("error", (event) => {
    const note = event.target.closest?.(".stage")?.querySelector(".stage-note");
    if (note && event.target === video()) note.hidden = false;
  }, true);
})();
