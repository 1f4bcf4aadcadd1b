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
        if (video.waiting.length) fail(video, "video.js cannot be read: run preview.py again");
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
    for (const item of layer === "truth" ? [] : objects) { // which are the predicted ones
        if (only !== null && item.id !== only) continue;
        const at = item.trail.find(([t]) => t === frame);
        if (element("trails").checked) drawTrail(brush, item, frame, scale, ratio);
        if (at) here.push([item, at]);
    }
    const names = here.map(([item]) => PREVIEW.classes[item.id].name);
    const said = layer === "truth" ? "true masks" : names.join(", ") || "no object";
    canvas.setAttribute("aria-label", `frame ${frame}: ${said}`);
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

// How much of two boxes { middle, half, top, high } lies over one another, in square pixels.
function shared(a, b) {
    const wide = Math.min(a.middle + a.half, b.middle + b.half) - Math.max(a.middle - a.half, b.middle - b.half);
    const high = Math.min(a.top + a.high, b.top + b.high) - Math.max(a.top, b.top);
    return Math.max(0, wide) * Math.max(0, high);
}

// Names beside their objects: above if there is room, else where they hide least of other names,
// then of other objects, which count as squares as high as they are.
function drawNames(brush, here, scale, ratio) {
    const high = 14 * ratio;
    brush.font = `${11 * ratio}px system-ui, sans-serif`;
    brush.textAlign = "center";
    brush.textBaseline = "top";
    const squares = here.map(([, [, x, y, top]]) => {
        const half = (y - top) * scale;
        return { middle: x * scale, half, top: top * scale, high: 2 * half };
    });
    const taken = [];
    here.forEach(([item], k) => {
        const name = PREVIEW.classes[item.id].name;
        const half = brush.measureText(name).width / 2 + 3 * ratio;
        const own = squares[k];
        const aside = own.half + half;
        const at = (right, down) => ({
            middle: Math.max(Math.min(own.middle + right, brush.canvas.width - half), half),
            half,
            top: Math.min(Math.max(own.top + down, 0), brush.canvas.height - high),
            high,
        });
        const beside = (own.high - high) / 2;
        const places = [at(0, -high), at(0, own.high), at(aside, beside), at(-aside, beside)];
        for (const right of [-0.6, 0.6]) places.push(at(right * half, -high), at(right * half, own.high));
        places.push(at(0, -2 * high), at(0, own.high + high), at(0, beside));
        const cost = (place) => {
            const names = taken.reduce((sum, other) => sum + shared(place, other), 0);
            const objects = squares.reduce((sum, other) => sum + shared(place, other) * (other === own ? 0.2 : 1), 0);
            const stays = places.indexOf(place) === item.placed ? 0 : 2 * high * ratio; // else names would jump
            return 4 * names + objects + stays;
        };
        const place = places.reduce((best, other) => (cost(other) < cost(best) ? other : best));
        item.placed = places.indexOf(place);
        taken.push(place);
        const { middle, top } = place;
        brush.lineWidth = 3 * ratio;
        brush.strokeStyle = "#000c";
        brush.lineJoin = "round";
        brush.strokeText(name, middle, top);
        brush.fillStyle = light(PREVIEW.classes[item.id].colour);
        brush.fillText(name, middle, top);
    });
}
