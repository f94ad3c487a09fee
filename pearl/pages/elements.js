'use strict';

const page = JSON.parse(document.getElementById('data').textContent);
const byId = (id) => document.getElementById(id);

/** Text only ever becomes text nodes and attributes: what the data say is never parsed as markup. */
function el(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

function svg(tag, properties = {}, ...children) {
  return filled(document.createElementNS('http://www.w3.org/2000/svg', tag), properties, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== false) node.setAttribute(name, value === true ? '' : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

const plural = (count, word, many = word + 's') => `${count.toLocaleString('en')} ${count === 1 ? word : many}`;
