(() => {
  const dial = document.getElementById("share"), out = document.getElementById("now"), play = document.getElementById("play");
  const films = [...document.querySelectorAll(".film")];
  let timer = 0;
  const show = () => {
    const share = dial.value / dial.max;
    out.textContent = Math.round(100 * share) + " %";
    for (const film of films) {
      const levels = JSON.parse(film.dataset.levels), count = levels.length;
      const step = Math.max(0, Math.floor(share * count + 1e-9) - 1);
      film.style.backgroundPositionX = count > 1 ? 100 * step / (count - 1) + "%" : "0";
      film.parentElement.querySelector("small").textContent = "step " + (step + 1) + " of " + count + ", t " + Math.round(levels[step]);
    }
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (dial.value === dial.max) dial.value = 0;
    play.textContent = "Stop";
    timer = setInterval(() => { dial.stepUp(); show(); if (dial.value === dial.max) stop(); }, 300);
  });
  dial.addEventListener("input", () => { stop(); show(); });
  show();
})();
