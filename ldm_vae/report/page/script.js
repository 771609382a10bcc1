"use strict";
(() => {
  // --- before / after: two pictures over each other, the upper one cut at the line
  const find = (selector) => document.querySelector(selector);
  const stage = find(".compare");
  if (!stage) return;
  const pictures = [...document.querySelectorAll("img[id$='-original']")].map((original) => {
    const card = original.closest(".card");
    const name = original.id.slice(0, -"-original".length);
    const others = [...card.querySelectorAll(`img[id^='${name}-']`)].filter((image) => image !== original);
    return {
      key: card.querySelector("h3").textContent,
      choices: [original, ...others],
      numbers: [...card.querySelectorAll(".numbers")],
    };
  });
  const canvas = find(".canvas"), viewport = find(".viewport"), split = find("#split");
  const before = find(".canvas .before"), after = find(".canvas .after");
  const left = find("#left"), right = find("#right");
  const levels = [0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32];
  let picture = pictures[0], level = 0, fitted = true, size = { width: 1, height: 1 };

  const moveLine = (percent) => {
    const bounded = Math.min(100, Math.max(0, percent));
    canvas.style.setProperty("--split", `${bounded}%`);
    split.value = bounded;
  };

  const zoomTo = (next) => {
    const middle = [
      (viewport.scrollLeft + viewport.clientWidth / 2) / viewport.scrollWidth,
      (viewport.scrollTop + viewport.clientHeight / 2) / viewport.scrollHeight,
    ];
    level = Math.min(levels.length - 1, Math.max(0, next));
    const zoom = levels[level];
    canvas.style.width = `${size.width * zoom}px`;
    canvas.style.height = `${size.height * zoom}px`;
    for (const image of [before, after]) image.classList.toggle("pixels", zoom >= 2);
    find("#zoom").textContent = `${zoom}×`;
    viewport.scrollLeft = middle[0] * viewport.scrollWidth - viewport.clientWidth / 2;
    viewport.scrollTop = middle[1] * viewport.scrollHeight - viewport.clientHeight / 2;
  };

  const fit = () => {
    const room = Math.min(viewport.clientWidth, 544);
    let best = 0;
    levels.forEach((zoom, index) => { if (Math.max(size.width, size.height) * zoom <= room) best = index; });
    zoomTo(best);
    fitted = true;
  };

  const draw = () => {
    const [a, b] = [picture.choices[left.value], picture.choices[right.value]];
    for (const [shown, image] of [[before, a], [after, b]]) {
      shown.src = image.src;
      shown.classList.toggle("film", "frames" in image.dataset);
      shown.dataset.frames = image.dataset.frames ?? 1;
      shown.style.objectPosition = image.style.objectPosition;
    }
    before.alt = a.alt;
    after.alt = b.alt;
    find(".tag.left").textContent = a.dataset.label;
    find(".tag.right").textContent = b.dataset.label;
    find(".which").textContent = picture.key;
    const numbers = picture.numbers[Math.max(0, right.value - 1)];
    find("#compare-numbers").innerHTML = right.value > 0 && numbers ? numbers.innerHTML : "";
  };

  const choose = (next) => {
    picture = next;
    document.querySelectorAll(".thumbnails button").forEach((button, index) => {
      button.setAttribute("aria-pressed", pictures[index] === picture);
    });
    const original = new Image();
    original.onload = () => {
      const height = original.naturalHeight / (picture.choices[0].dataset.frames ?? 1);
      const changed = size.width !== original.naturalWidth || size.height !== height;
      size = { width: original.naturalWidth, height };
      if (changed) fit();
    };
    original.src = picture.choices[0].src;
    draw();
  };

  for (const select of [left, right]) {
    pictures[0].choices.forEach((image, index) => select.add(new Option(image.dataset.label, index)));
    select.addEventListener("change", draw);
  }
  left.value = 0;
  right.value = 1;
  pictures.forEach((one) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", one.key);
    const thumbnail = new Image();
    thumbnail.src = one.choices[0].src;
    thumbnail.alt = "";
    if ("frames" in one.choices[0].dataset) thumbnail.style.objectPosition = "0 0";
    button.append(thumbnail);
    button.addEventListener("click", () => choose(one));
    find(".thumbnails").append(button);
  });
  split.addEventListener("input", () => moveLine(Number(split.value)));
  find("#zoom-in").addEventListener("click", () => { zoomTo(level + 1); fitted = false; });
  find("#zoom-out").addEventListener("click", () => { zoomTo(level - 1); fitted = false; });
  window.addEventListener("resize", () => { if (fitted) fit(); });

  const follow = (event) => {
    const box = canvas.getBoundingClientRect();
    moveLine(100 * (event.clientX - box.left) / box.width);
  };
  canvas.addEventListener("pointerdown", (event) => {
    // a finger beside the line scrolls the enlarged picture
    if (event.pointerType === "touch" && !event.target.closest(".divider")) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    follow(event);
    canvas.addEventListener("pointermove", follow);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, () => canvas.removeEventListener("pointermove", follow));
  }
  choose(pictures[0]);
})();

(() => {
  // --- films: all of the page show one frame, by one clock
  const player = document.querySelector(".player");
  if (!player) return;
  const slider = document.querySelector("#frame"), button = document.querySelector("#play");
  const last = Number(slider.max) - 1, rate = Number(player.dataset.rate);
  let frame = 0, playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, shownAt = 0;

  const show = (next) => {
    frame = next;
    for (const film of document.querySelectorAll("img.film")) {
      const own = film.dataset.frames - 1; // latents have fewer
      film.style.objectPosition = `0 ${100 * Math.round(frame * own / last) / own}%`;
    }
    slider.value = frame + 1;
    document.querySelector("#frame-number").textContent = `${frame + 1} of ${last + 1}`;
  };
  const play = (now) => {
    if (!playing) return;
    if (now - shownAt >= 1000 / rate) {
      shownAt = now - shownAt > 4000 / rate ? now : shownAt + 1000 / rate; // a page in the background stood still
      show(frame === last ? 0 : frame + 1);
    }
    requestAnimationFrame(play);
  };
  const set = (on) => {
    playing = on;
    player.classList.toggle("stopped", !on);
    button.setAttribute("aria-label", on ? "stop" : "play");
    if (on) requestAnimationFrame(play);
  };
  button.addEventListener("click", () => set(!playing));
  slider.addEventListener("input", () => { set(false); show(slider.value - 1); });
  show(0);
  set(playing);
})();

(() => {
  // --- charts: the values under the pointer
  for (const chart of document.querySelectorAll(".chart[data-series]")) {
    const series = JSON.parse(chart.dataset.series);
    const svg = chart.querySelector("svg"), readout = chart.querySelector(".readout");
    const cursor = svg.querySelector("line").cloneNode();
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", 36);
    cursor.setAttribute("y2", 216);
    const hide = () => { readout.hidden = true; cursor.remove(); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) * 400 / box.width;
      const nearest = series.filter((one) => one.at.length).map((one) => ({
        label: one.label,
        point: one.at.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best),
      }));
      const at = nearest[0].point;
      cursor.setAttribute("x1", at[0]);
      cursor.setAttribute("x2", at[0]);
      svg.append(cursor);
      readout.replaceChildren(at[2], ...nearest.flatMap((one) => [document.createElement("br"), `${one.label} ${one.point[3]}`]));
      readout.hidden = false;
      const share = at[0] / 400;
      readout.style.left = share > 0.5 ? "" : `${share * box.width + 8}px`;
      readout.style.right = share > 0.5 ? `${(1 - share) * box.width + 8}px` : "";
    });
    svg.addEventListener("pointerleave", hide);
  }
})();
