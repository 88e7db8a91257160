// The whole time of the chosen GPU, with the stretch in view. What does not change is drawn once.

let wholeMap = null,
  mapOf = "";

function drawMap() {
  const { width, gutter } = size,
    room = width - gutter;
  const of = [page.gpus.indexOf(shown.gpu), canvas.width, devicePixelRatio, colour.ground].join();
  if (of !== mapOf) {
    wholeMap = document.createElement("canvas");
    wholeMap.width = map.width;
    wholeMap.height = map.height;
    const on = { brush: wholeMap.getContext("2d", { alpha: false }), from: 0, to: wholeEnd, perNs: room / wholeEnd };
    on.brush.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    on.brush.fillStyle = colour.ground;
    on.brush.fillRect(0, 0, width, MAP);
    on.brush.fillStyle = colour.panel;
    on.brush.fillRect(gutter, 0, room, MAP);
    bands(shown.gpu, 2, (MAP - 4) / 2, on);
    mapOf = of;
  }
  mapBrush.setTransform(1, 0, 0, 1, 0, 0);
  mapBrush.drawImage(wholeMap, 0, 0);
  mapBrush.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  const from = gutter + (view.from / wholeEnd) * room,
    to = gutter + (view.to / wholeEnd) * room;
  mapBrush.fillStyle = colour.ground;
  mapBrush.globalAlpha = 0.7;
  mapBrush.fillRect(gutter, 0, from - gutter, MAP);
  mapBrush.fillRect(to, 0, width - to, MAP);
  mapBrush.globalAlpha = 1;
  mapBrush.strokeStyle = colour.accent;
  mapBrush.lineWidth = 1.5;
  mapBrush.strokeRect(from + 0.75, 0.75, Math.max(2, to - from - 1.5), MAP - 1.5);
}
