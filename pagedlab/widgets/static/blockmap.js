// A map of a pool of blocks on a canvas: one tile a block, fed by binary frames and deltas.
//
//   frame   n bytes of codes, then n little-endian int32 notes      (trait, so a reloaded page gets it back)
//   delta   uint32 positions, uint8 codes, int32 notes              (custom message)
//
// Code 0 is free, then come the colours of running sequences, then shared, cached, claimed (held, still
// empty), null. Text reaches the page as textContent only.

const COLORS = 6;
const FREE = 0;
const SHARED = COLORS + 1;
const CACHED = COLORS + 2;
const CLAIMED = COLORS + 3;
const NULL = COLORS + 4;
const NUM_CODES = COLORS + 5;
const DETAILED = 6; // tiles smaller than this are plain pixels

const isDark = () => {
  const body = document.body;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  return body.classList.contains("vscode-dark");
};

const element = (tag, className, parent) => {
  const node = document.createElement(tag);
  node.className = className;
  parent?.append(node);
  return node;
};

function drawTile(ctx, code, x, y, size, palette) {
  const gap = size >= 10 ? 2 : 1;
  const side = size - gap;
  const radius = Math.min(3, side / 5);
  ctx.save();
  ctx.beginPath();
  ctx.roundRect(x, y, side, side, radius);
  ctx.clip();
  ctx.fillStyle = palette[code];
  ctx.fillRect(x, y, side, side);
  if (code === CACHED) {
    ctx.strokeStyle = palette[NUM_CODES];
    ctx.lineWidth = Math.max(1, side / 8);
    const pitch = Math.max(3, side / 2.6);
    ctx.beginPath();
    for (let d = pitch / 2; d < 2 * side; d += pitch) {
      ctx.moveTo(x + d + 1, y - 1);
      ctx.lineTo(x + d - side - 1, y + side + 1);
    }
    ctx.stroke();
  } else if (code === SHARED) {
    ctx.fillStyle = palette[NUM_CODES + 1];
    ctx.beginPath();
    ctx.arc(x + side / 2, y + side / 2, Math.max(1.2, side / 5), 0, 2 * Math.PI);
    ctx.fill();
  } else if (code === CLAIMED) {
    ctx.strokeStyle = palette[NUM_CODES];
    ctx.lineWidth = Math.max(1.5, side / 6);
    ctx.beginPath();
    ctx.roundRect(x, y, side, side, radius);
    ctx.stroke();
  } else if (code === NULL) {
    ctx.strokeStyle = palette[NUM_CODES];
    ctx.lineWidth = Math.max(1, side / 8);
    const inset = side * 0.25;
    ctx.beginPath();
    ctx.moveTo(x + inset, y + inset);
    ctx.lineTo(x + side - inset, y + side - inset);
    ctx.moveTo(x + side - inset, y + inset);
    ctx.lineTo(x + inset, y + side - inset);
    ctx.stroke();
  }
  ctx.restore();
}

function describe(index, code, note, model) {
  const labels = model.get("labels");
  if (code === FREE) return `block ${index} · ${labels.free}`;
  if (code === SHARED) return `block ${index} · ${labels.shared} by ${note} sequences`;
  if (code === CACHED) return `block ${index} · ${labels.cached} · ${note} hit${note === 1 ? "" : "s"}`;
  if (code === NULL) return `block ${index} · ${labels.null}`;
  const holder = model.get("names")[note] ?? `sequence ${note}`;
  return `block ${index} · ${code === CLAIMED ? `${labels.claimed} · ` : ""}${holder}`;
}

export default () => {
  let codes = new Uint8Array(0);
  let notes = new Int32Array(0);
  const views = new Set();
  const redraw = () => views.forEach((view) => view());

  return {
    initialize({ model }) {
      const onFrame = () => {
        const n = model.get("n_blocks");
        const frame = model.get("frame");
        codes = new Uint8Array(n);
        notes = new Int32Array(n);
        if (frame && frame.byteLength === 5 * n) {
          const bytes = new Uint8Array(frame.buffer, frame.byteOffset, 5 * n);
          codes.set(bytes.subarray(0, n));
          notes.set(new Int32Array(bytes.slice(n).buffer));
        }
        redraw();
      };
      const onMessage = (message, buffers) => {
        if (message?.kind !== "delta") return;
        const copy = (b) => b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength);
        const where = new Uint32Array(copy(buffers[0]));
        const newCodes = new Uint8Array(copy(buffers[1]));
        const newNotes = new Int32Array(copy(buffers[2]));
        where.forEach((block, k) => {
          if (block < codes.length) {
            codes[block] = newCodes[k];
            notes[block] = newNotes[k];
          }
        });
        redraw();
      };
      model.on("change:frame", onFrame);
      model.on("msg:custom", onMessage);
      onFrame();
      return () => {
        model.off("change:frame", onFrame);
        model.off("msg:custom", onMessage);
      };
    },

    render({ model, el }) {
      const root = element("div", "pl-blockmap", el);
      const title = element("div", "pl-blockmap-title", root);
      const stage = element("div", "pl-blockmap-stage", root);
      const canvas = element("canvas", "pl-blockmap-canvas", stage);
      const tip = element("div", "pl-blockmap-tip", stage);
      const legend = element("div", "pl-blockmap-legend", root);
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "img");
      tip.hidden = true;

      let scheduled = 0;
      let frames = 0;
      let geometry = "";
      let cell = 0;
      let cols = 1;
      let rows = 1;
      let gutter = 0;
      let palette = [];
      let drawn = new Uint8Array(0);
      let sprites = [];
      let hovered = -1;
      let entries = {};

      const buildSprites = (size, dpr) => {
        sprites = [];
        for (let code = 0; code < NUM_CODES; code++) {
          const sprite = document.createElement("canvas");
          sprite.width = sprite.height = Math.ceil(size * dpr);
          const ctx = sprite.getContext("2d");
          ctx.scale(dpr, dpr);
          drawTile(ctx, code, 0, 0, size, palette);
          sprites.push(sprite);
        }
      };

      const buildLegend = (dpr) => {
        legend.replaceChildren();
        entries = {};
        const labels = model.get("labels");
        const kinds = [
          ["free", [FREE]],
          ["running", Array.from({ length: COLORS }, (_, i) => i + 1)],
          ["shared", [SHARED]],
          ["cached", [CACHED]],
          ["claimed", [CLAIMED]],
          ["null", [NULL]],
        ];
        for (const [kind, shown] of kinds) {
          const entry = element("span", "pl-blockmap-entry", legend);
          const swatch = element("canvas", "pl-blockmap-swatch", entry);
          const step = shown.length > 1 ? 9 : 14;
          const width = shown.length * step;
          swatch.width = Math.ceil(width * dpr);
          swatch.height = Math.ceil(14 * dpr);
          swatch.style.width = `${width}px`;
          swatch.style.height = "14px";
          const ctx = swatch.getContext("2d");
          ctx.scale(dpr, dpr);
          shown.forEach((code, i) => drawTile(ctx, code, i * step, shown.length > 1 ? 2.5 : 0, shown.length > 1 ? 10 : 15, palette));
          element("span", "pl-blockmap-label", entry).textContent = labels[kind];
          const count = element("span", "pl-blockmap-count", entry);
          entries[kind] = { entry, count };
        }
      };

      const layOut = () => {
        const n = codes.length;
        const available = root.clientWidth;
        const dpr = window.devicePixelRatio || 1;
        cols = Math.max(1, model.get("cols"));
        rows = Math.max(1, Math.ceil(n / cols));
        const limit = model.get("max_cell");
        gutter = Math.floor((available - 38) / cols) >= 10 ? 38 : 0;
        cell = Math.max(2, Math.min(limit, Math.floor((available - gutter) / cols)));
        const now = [available > 0, n, cols, cell, gutter, dpr, isDark(), JSON.stringify(model.get("labels"))].join();
        if (now === geometry) return false;
        geometry = now;
        palette = model.get("palettes")[isDark() ? "dark" : "light"];
        canvas.width = Math.ceil((gutter + cols * cell) * dpr);
        canvas.height = Math.ceil(rows * cell * dpr);
        canvas.style.width = `${gutter + cols * cell}px`;
        canvas.style.height = `${rows * cell}px`;
        if (cell >= DETAILED) buildSprites(cell, dpr);
        buildLegend(dpr);
        return true;
      };

      const drawPixels = (ctx) => {
        const small = document.createElement("canvas");
        small.width = cols;
        small.height = rows;
        const image = small.getContext("2d").createImageData(cols, rows);
        const rgb = palette.map((hex) => parseInt(hex.slice(1), 16));
        for (let i = 0; i < codes.length; i++) {
          const value = rgb[codes[i]] ?? 0;
          image.data.set([value >> 16, (value >> 8) & 255, value & 255, 255], 4 * i);
        }
        small.getContext("2d").putImageData(image, 0, 0);
        ctx.imageSmoothingEnabled = false;
        ctx.drawImage(small, gutter, 0, cols * cell, rows * cell);
      };

      // Two rings, one dark and one light, so that it shows on any tile.
      const outline = (ctx, block, width) => {
        if (block < 0 || block >= codes.length) return;
        const x = gutter + (block % cols) * cell;
        const y = Math.floor(block / cols) * cell;
        const side = cell - (cell >= 10 ? 2 : 1);
        const rings = cell < DETAILED ? [[NUM_CODES + 2, 0]] : [[NUM_CODES + 1, width], [NUM_CODES + 2, 0]];
        for (const [color, inset] of rings) {
          const at = inset + width / 2;
          ctx.strokeStyle = palette[color];
          ctx.lineWidth = width;
          ctx.beginPath();
          ctx.roundRect(x + at, y + at, side - 2 * at, side - 2 * at, Math.min(3, side / 5));
          ctx.stroke();
        }
      };

      const draw = () => {
        scheduled = 0;
        if (!root.clientWidth) return;
        const dpr = window.devicePixelRatio || 1;
        let everything = layOut();
        const n = codes.length;
        if (drawn.length !== n) {
          drawn = new Uint8Array(n);
          everything = true;
        }
        const ctx = canvas.getContext("2d");
        ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
        const counts = new Uint32Array(NUM_CODES);
        for (let i = 0; i < n; i++) counts[codes[i]]++;
        const marked = [hovered, model.get("selected"), root.marked ?? -1, root.hinted ?? -1];
        if (cell < DETAILED) {
          drawPixels(ctx);
        } else {
          if (everything) {
            ctx.clearRect(0, 0, canvas.width, canvas.height);
            if (gutter) {
              ctx.fillStyle = palette[NUM_CODES + 3];
              ctx.font = "10px monospace";
              ctx.textAlign = "right";
              ctx.textBaseline = "middle";
              for (let row = 0; row < rows; row += cell < 12 ? 2 : 1) {
                ctx.fillText(String(row * cols), gutter - 8, row * cell + cell / 2 - 0.5);
              }
            }
          }
          for (let i = 0; i < n; i++) {
            if (!everything && drawn[i] === codes[i] && !marked.includes(i)) continue;
            const x = gutter + (i % cols) * cell;
            const y = Math.floor(i / cols) * cell;
            ctx.clearRect(x, y, cell, cell);
            ctx.drawImage(sprites[codes[i]], x, y, cell, cell);
          }
          drawn.set(codes);
        }
        outline(ctx, model.get("selected"), Math.max(1.5, cell / 9));
        if (hovered !== model.get("selected")) outline(ctx, hovered, 1);
        root.marked = model.get("selected");
        root.hinted = hovered;
        const running = counts.subarray(1, COLORS + 1).reduce((a, b) => a + b, 0);
        const totals = {
          free: counts[FREE],
          running,
          shared: counts[SHARED],
          cached: counts[CACHED],
          claimed: counts[CLAIMED],
          null: counts[NULL],
        };
        for (const [kind, { entry, count }] of Object.entries(entries)) {
          count.textContent = totals[kind];
          entry.hidden = totals[kind] === 0 && (kind === "null" || !model.get("labels")[kind]);
        }
        title.textContent = model.get("title");
        title.hidden = !model.get("title");
        root.dataset.frames = ++frames;
        root.dataset.counts = JSON.stringify(totals);
        const labels = model.get("labels");
        const words = Object.entries(totals).filter(([kind, count]) => count && labels[kind]).map(([kind, count]) => `${count} ${labels[kind]}`);
        canvas.setAttribute("aria-label", `${model.get("title") || "Block map"}: ${words.join(", ")}`);
        if (hovered >= 0) showTip(hovered);
      };
      const schedule = () => {
        if (!scheduled) scheduled = requestAnimationFrame(draw);
      };

      const showTip = (block) => {
        tip.textContent = describe(block, codes[block], notes[block], model);
        tip.hidden = false;
        const x = gutter + (block % cols) * cell;
        const y = Math.floor(block / cols) * cell;
        tip.style.left = `${Math.max(0, Math.min(x, root.clientWidth - tip.offsetWidth))}px`;
        tip.style.top = `${y - tip.offsetHeight - 4 >= -40 ? y - tip.offsetHeight - 4 : y + cell + 4}px`;
      };
      const blockAt = (event) => {
        const box = canvas.getBoundingClientRect();
        const col = Math.floor(((event.clientX - box.left) / box.width * (gutter + cols * cell) - gutter) / cell);
        const row = Math.floor((event.clientY - box.top) / box.height * rows);
        const block = row * cols + col;
        return col >= 0 && col < cols && row >= 0 && block < codes.length ? block : -1;
      };
      const hover = (block) => {
        hovered = block;
        if (block < 0) tip.hidden = true;
        schedule();
      };
      const select = (block) => {
        model.set("selected", block);
        model.save_changes();
        schedule();
      };
      canvas.addEventListener("mousemove", (event) => hover(blockAt(event)));
      canvas.addEventListener("mouseleave", () => hover(-1));
      canvas.addEventListener("click", (event) => {
        const block = blockAt(event);
        select(block === model.get("selected") ? -1 : block);
      });
      canvas.addEventListener("keydown", (event) => {
        const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -cols, ArrowDown: cols };
        if (!(event.key in steps)) return;
        event.preventDefault();
        event.stopPropagation();
        const block = Math.max(0, Math.min(codes.length - 1, Math.max(0, model.get("selected")) + steps[event.key]));
        select(block);
        hover(block);
      });

      views.add(schedule);
      const traits = ["cols", "max_cell", "labels", "names", "title", "selected"];
      traits.forEach((name) => model.on(`change:${name}`, schedule));
      const resized = new ResizeObserver(schedule);
      resized.observe(root);
      const themed = new MutationObserver(schedule);
      themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
      schedule();
      return () => {
        views.delete(schedule);
        traits.forEach((name) => model.off(`change:${name}`, schedule));
        resized.disconnect();
        themed.disconnect();
        if (scheduled) cancelAnimationFrame(scheduled);
      };
    },
  };
};
