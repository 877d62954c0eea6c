"use strict";
{
  const { charts, images } = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = ["#1f77b4", "#e6550d", "#2ca02c", "#9467bd", "#d62728", "#8c564b", "#e377c2", "#17a2b8"];
  const WIDTH = 560, HEIGHT = 260, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 24;

  // An element; texts only ever arrive as text.
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const svg = (tag, attributes = {}, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };
  const asText = value => value === null ? "-" : String(Number(value.toPrecision(5)));

  // Round values between low and high: about five, or of a logarithmic axis its powers of ten.
  const ticks = (low, high, log) => {
    if (log) {
      const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
      if (last > first) return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
    }
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find(factor => factor * power >= raw);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  };

  const scale = (values, from, to, log) => {
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
    const f = log ? Math.log : value => value;
    const place = value => from + (to - from) * (f(value) - f(low)) / (f(high) - f(low));
    return { low, high, place };
  };

  // A path through the points, interrupted where a value is missing.
  const trace = (points, x, y, drawable) => {
    let open = false, path = "";
    for (const [at, value] of points) {
      if (drawable(value)) path += `${open ? "L" : "M"}${x.place(at).toFixed(1)} ${y.place(value).toFixed(1)}`;
      open = drawable(value);
    }
    return path;
  };

  const drawAxes = (picture, x, y, log) => {
    for (const value of ticks(y.low, y.high, log)) {
      const at = y.place(value);
      picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
      picture.append(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, asText(value)));
    }
    for (const value of ticks(x.low, x.high, false)) {
      picture.append(svg("text", { x: x.place(value), y: HEIGHT - 6, "text-anchor": "middle" }, asText(value)));
    }
  };

  // The values of all series at the pointer's place.
  const follow = (picture, tip, chart, x) => {
    const cursor = picture.appendChild(svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM }));
    const places = [...new Set(chart.series.flatMap(series => series.points.map(point => point[0])))];
    const values = chart.series.map(series => new Map(series.points));
    picture.addEventListener("pointermove", event => {
      const box = picture.getBoundingClientRect();
      const pointer = (event.clientX - box.left) / box.width * WIDTH;
      const far = place => Math.abs(x.place(place) - pointer);
      const nearest = places.reduce((best, place) => far(place) < far(best) ? place : best);
      const lines = chart.series.map((series, i) => [series.name, values[i].get(nearest)]);
      const shown = lines.filter(line => line[1] !== undefined).map(line => `${line[0]}  ${asText(line[1])}`);
      tip.textContent = [`${chart.x} ${nearest}`, ...shown].join("\n");
      tip.style.display = "block";
      tip.style.left = pointer < WIDTH / 2 ? `${(pointer + 12) / WIDTH * 100}%` : "auto";
      tip.style.right = pointer < WIDTH / 2 ? "auto" : `${(WIDTH - pointer + 12) / WIDTH * 100}%`;
      cursor.setAttribute("x1", x.place(nearest));
      cursor.setAttribute("x2", x.place(nearest));
      cursor.style.visibility = "visible";
    });
    picture.addEventListener("pointerleave", () => {
      tip.style.display = "none";
      cursor.style.visibility = "hidden";
    });
  };

  const draw = chart => {
    const points = chart.series.flatMap(series => series.points);
    const drawable = value => value !== null && (!chart.log || value > 0);
    const values = points.map(point => point[1]).filter(drawable);
    const unit = make("small", { textContent: ` by ${chart.x}` });
    const box = make("div", { className: "chart" }, make("h3", {}, chart.title, unit));
    if (!values.length) return box;
    const x = scale(points.map(point => point[0]), LEFT, WIDTH - RIGHT, false);
    const y = scale(values, HEIGHT - BOTTOM, TOP, chart.log);
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    picture.append(svg("title", {}, chart.title));
    drawAxes(picture, x, y, chart.log);
    const key = make("div", { className: "key" }), tip = make("div", { className: "tip" });
    chart.series.forEach((series, i) => {
      const colour = COLOURS[i % COLOURS.length];
      picture.append(svg("path", { d: trace(series.points, x, y, drawable), stroke: colour }));
      if (series.points.length <= 40) {
        for (const [at, value] of series.points.filter(point => drawable(point[1]))) {
          picture.append(svg("circle", { cx: x.place(at), cy: y.place(value), r: 2.5, fill: colour }));
        }
      }
      const entry = make("span", { textContent: series.name });
      entry.style.setProperty("--colour", colour);
      if (chart.series.length > 1) key.append(entry);
    });
    follow(picture, tip, chart, x);
    box.append(picture, key, tip);
    return box;
  };

  // ---- gallery ----------------------------------------------------------------------------------------------

  const gain = (image, metric) => image[metric][1] - image[metric][0];
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

  const card = (image, number) => {
    const before = make("img", { alt: "mixture" }), after = make("img", { alt: "transmission" });
    const handle = make("div", { className: "handle" });
    const slider = make("input", { type: "range", min: 0, max: 100, step: 0.1, value: 50 });
    slider.setAttribute("aria-label", "where the mixture ends");
    const stage = make("div", { className: "stage" }, after, before, handle, slider);
    stage.style.aspectRatio = `${image.width} / ${image.height}`;
    const move = () => {
      before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
      handle.style.left = `${slider.value}%`;
    };
    slider.addEventListener("input", move);
    move();

    let pictures = null;
    const buttons = image.kinds.map(kind => make("button", { textContent: kind, type: "button" }));
    const show = kind => {
      pictures ??= JSON.parse(document.getElementById(`picture${number}`).textContent);
      before.src = pictures.input;
      after.src = pictures[kind];
      after.alt = kind;
      for (const button of buttons) button.setAttribute("aria-pressed", button.textContent === kind);
    };
    for (const button of buttons) button.addEventListener("click", () => show(button.textContent));

    const psnr = `${image.PSNR[1].toFixed(2)} dB (${signed(gain(image, "PSNR"), 2)})`;
    const ssim = `SSIM ${image.SSIM[1].toFixed(3)} (${signed(gain(image, "SSIM"), 3)})`;
    const figures = make("p", { textContent: `${psnr}, ${ssim}`, className: gain(image, "PSNR") < 0 ? "worse" : "" });
    const title = make("h3", {}, image.name, " ", make("small", { textContent: image.set }));
    const element = make("article", { className: "card" }, title, figures, stage, ...buttons);
    element.reveal = () => show("transmission");
    return element;
  };

  const byName = (a, b) => a.name < b.name ? -1 : Number(a.name > b.name);
  const ORDERS = {
    gain: (a, b) => gain(a, "PSNR") - gain(b, "PSNR"),
    best: (a, b) => gain(b, "PSNR") - gain(a, "PSNR"),
    psnr: (a, b) => a.PSNR[1] - b.PSNR[1],
    name: byName,
    set: (a, b) => a.set < b.set ? -1 : a.set > b.set ? 1 : byName(a, b),
  };

  const FIRST = 12; // cards that are shown until all are asked for

  const fill = gallery => {
    const [sort, filter, count, more] = ["sort", "filter", "count", "more"].map(id => document.getElementById(id));
    const cards = new Map(images.map((image, number) => [image, card(image, number)]));
    for (const name of new Set(images.map(image => image.set))) {
      filter.append(make("option", { textContent: name, value: name }));
    }
    let most = FIRST;
    const arrange = () => {
      const wanted = images.filter(image => !filter.value || image.set === filter.value).sort(ORDERS[sort.value]);
      gallery.replaceChildren(...wanted.slice(0, most).map(image => cards.get(image)));
      count.textContent = `${wanted.length} images`;
      more.textContent = `Show all ${wanted.length}`;
      more.hidden = wanted.length <= most;
    };
    sort.addEventListener("change", arrange);
    filter.addEventListener("change", arrange);
    more.addEventListener("click", () => {
      most = Infinity;
      arrange();
    });
    arrange();

    // Pictures are unpacked as they come near the window.
    const near = new IntersectionObserver(entries => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting) {
          target.reveal();
          near.unobserve(target);
        }
      }
    }, { rootMargin: "800px" });
    for (const element of cards.values()) near.observe(element);
  };

  document.getElementById("charts").append(...charts.map(draw));

  const gallery = document.getElementById("gallery");
  if (gallery) fill(gallery);
}
