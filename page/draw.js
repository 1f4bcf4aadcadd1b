// Files of one video, and one frame of it on a canvas: a layer over the picture, names, trails.
// Called from preview.js, whose `byName`, `redraw` and `describe` it calls when a file has come.
"use strict";

const element = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
};

// ---- files ----------------------------------------------------------------------------------

// Called by each video.js.
function arrived([name, record]) {
    const video = byName.get(name);
    if (!video) return;
    video.record = record;
    video.waiting.splice(0).forEach((go) => go());
}

function withRecord(video, go) {
    if (video.record) return void go();
    video.waiting.push(go);
    if (video.waiting.length > 1) return;
    const script = make("script", { src: `${video.folder}/video.js` });
    script.onload = script.onerror = () => {
        script.remove();
        if (!video.record) fail(video, "video.js cannot be read: run preview.py again");
    };
    document.head.append(script);
}

function picture(video, file) {
    if (!video.pictures[file]) {
        const image = new Image();
        image.onload = () => redraw(video);
        image.onerror = () => fail(video, `${file} cannot be read: run preview.py again`);
        image.src = `${video.folder}/${file}`;
        video.pictures[file] = image;
    }
    const image = video.pictures[file];
    return image.complete && image.naturalWidth ? image : null;
}

function fail(video, text) {
    video.waiting.length = 0;
    video.fault = text;
    describe(video);
}

// ---- drawing --------------------------------------------------------------------------------

const SHEETS = { masks: "masks.png", truth: "truth.png", differs: "differs.png" };

// Draw one frame of a video with a layer over it; sizes are in the canvas's own pixels.
function draw(canvas, video, frame, layer, only = null) {
    const { size: [width, height], tile, columns, objects } = video.record;
    const ratio = devicePixelRatio;
    const wide = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const high = Math.max(1, Math.round((wide * height) / width));
    if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
    const brush = canvas.getContext("2d");
    const lay = (image, smooth) => {
        if (!image) return false;
        const x = (frame % columns) * tile[0];
        const y = Math.floor(frame / columns) * tile[1];
        brush.imageSmoothingEnabled = smooth;
        brush.drawImage(image, x, y, width, height, 0, 0, wide, high);
        return true;
    };
    if (!lay(picture(video, "frames.jpg"), true)) return;
    if (layer) lay(picture(video, SHEETS[layer]), false);
    const scale = wide / width;
    const here = [];
    for (const item of objects) {
        if (only !== null && item.id !== only) continue;
        const at = item.trail.find(([t]) => t === frame);
        if (element("trails").checked) drawTrail(brush, item, frame, scale, ratio);
        if (at) here.push([item, at]);
    }
    const names = here.map(([item]) => PREVIEW.classes[item.id].name);
    canvas.setAttribute("aria-label", `frame ${frame}: ${names.join(", ") || "no object"}`);
    if (element("names").checked && layer) drawNames(brush, here, scale, ratio);
}

// A colour "#rrggbb" half way to white, to be read on dark.
function light(colour) {
    const halves = [1, 3, 5].map((i) => (255 + parseInt(colour.slice(i, i + 2), 16)) >> 1);
    return `rgb(${halves.join(" ")})`;
}

// Where the centre of an object has been until now, if it has moved.
function drawTrail(brush, item, frame, scale, ratio) {
    const past = item.trail.filter(([t]) => t <= frame);
    if (!past.some(([, x, y]) => Math.hypot(x - past[0][1], y - past[0][2]) > 3)) return;
    brush.beginPath();
    let last = null;
    for (const [t, x, y] of past) {
        if (last === t - 1) brush.lineTo(x * scale, y * scale);
        else brush.moveTo(x * scale, y * scale);
        last = t;
    }
    brush.lineJoin = brush.lineCap = "round";
    brush.strokeStyle = "#0008";
    brush.lineWidth = 3 * ratio;
    brush.stroke();
    brush.strokeStyle = PREVIEW.classes[item.id].colour;
    brush.lineWidth = 1.5 * ratio;
    brush.stroke();
}

// Names above their objects, each moved up, or else down, until it lies over no other.
function drawNames(brush, here, scale, ratio) {
    const high = 14 * ratio;
    brush.font = `${11 * ratio}px system-ui, sans-serif`;
    brush.textAlign = "center";
    brush.textBaseline = "top";
    const taken = [];
    for (const [item, [, x, , y]] of here.sort((a, b) => b[1][3] - a[1][3])) {
        const name = PREVIEW.classes[item.id].name;
        const half = brush.measureText(name).width / 2 + 3 * ratio;
        const middle = Math.min(Math.max(x * scale, half), brush.canvas.width - half);
        let top = y * scale - high;
        const over = (box) => Math.abs(box.middle - middle) < box.half + half && Math.abs(box.top - top) < high;
        for (let box = taken.find(over); box && top > 0; box = taken.find(over)) top = box.top - high;
        if (top < 0) top = 0;
        for (let box = taken.find(over); box; box = taken.find(over)) top = box.top + high;
        taken.push({ middle, half, top });
        brush.lineWidth = 3 * ratio;
        brush.strokeStyle = "#000c";
        brush.lineJoin = "round";
        brush.strokeText(name, middle, top);
        brush.fillStyle = light(PREVIEW.classes[item.id].colour);
        brush.fillText(name, middle, top);
    }
}
